"""Imported by verl when `VERL_USE_EXTERNAL_MODULES` names it: registers our loss mode in that process."""

from vigos.integrations.verl import register

register()

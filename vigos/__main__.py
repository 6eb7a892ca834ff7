"""Run the command line as `python -m vigos …`, also under `accelerate launch` and `torchrun`."""

from vigos.cli import main

if __name__ == "__main__":
    main()

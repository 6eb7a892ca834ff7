#!/usr/bin/env bash
# A compiler's launcher for CMake, where a test asks whether something builds and not how fast it is.
exec "${@/#-O3/-O0}"

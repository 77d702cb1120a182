"""python -m blip3o_rt: the same as the blip3o-rt command."""

import sys

from blip3o_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())

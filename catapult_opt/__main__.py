"""``python -m catapult_opt``: the command line."""

import sys

from catapult_opt.cli import main

sys.exit(main())

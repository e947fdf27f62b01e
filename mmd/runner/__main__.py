"""`python -m mmd.runner`: the same as mmd-runner."""

import sys

from mmd.runner import main

sys.exit(main())

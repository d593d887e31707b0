"""`python -m qjax.cli`."""

import sys

from qjax.cli import main

sys.exit(main())

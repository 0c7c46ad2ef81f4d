"""`python -m proxyd`."""

import sys

from proxyd.cli.entry import main

sys.exit(main())

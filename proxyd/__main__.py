"""`python -m proxyd`."""

import sys

from proxyd.cli.main import main

sys.exit(main())

"""`python -m bench.report`: see page.py."""

import sys

from bench.report.page import main

sys.exit(main())

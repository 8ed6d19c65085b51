"""``python -m vflow_server``: the same as the command ``vflow``."""

import sys

from vflow_server.cli import main

sys.exit(main())

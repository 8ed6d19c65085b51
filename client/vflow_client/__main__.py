"""`python -m vflow_client`: a conversation in the terminal."""

import sys

from vflow_client.terminal import main

sys.exit(main())

"""diffusers needs Python 3.11; below that there is no model to accelerate."""

import sys

collect_ignore_glob = ["test_*.py"] if sys.version_info < (3, 11) else []

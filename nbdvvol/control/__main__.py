"""`python -m nbdvvol.control`."""

import sys

from nbdvvol.control.daemon import main

sys.exit(main())

"""The operator, with watches that end and begin anew, and are dead, after seconds and not minutes.

No setting says so, as nobody has a reason to change it: `hasty_operator.py --settings FILE ...`.
"""

import sys

from cptjob_operator import handlers
from cptjob_operator.__main__ import main

handlers._WATCH_SECONDS = 2
handlers.DEAD_AFTER_SECONDS = 8.0

if __name__ == "__main__":
    sys.exit(main())

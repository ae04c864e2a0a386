"""Imported first, keeps the operator small.

Where the official Kubernetes client is installed, kopf imports all of it to know its types, none of
which is used here: 45 MiB, as much as everything else that is imported.
"""

import sys

sys.modules.setdefault("kubernetes", None)  # type: ignore[arg-type]

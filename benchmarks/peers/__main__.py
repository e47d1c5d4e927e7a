from __future__ import annotations

import sys

from . import NAMES, TITLES, child, measure

if len(sys.argv) == 4 and sys.argv[3].isdigit():
    child(*sys.argv[1:])
for name in sys.argv[1:] or NAMES:
    for result in measure(name):
        print(f"{TITLES[name]}: {result.case}: {result.outcome} {result.why}")

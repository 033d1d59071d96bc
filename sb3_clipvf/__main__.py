"""``python -m sb3_clipvf`` is the console command ``sb3-clipvf``."""

import sys

from sb3_clipvf.zoo import main

if __name__ == "__main__":
    sys.exit(main())

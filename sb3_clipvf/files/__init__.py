"""Reading and writing models and statistics: atomically, and without running code that a file brings."""

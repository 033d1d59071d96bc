"""What every layer uses: checks of arguments, messages, versions, memory, compiling, finite checks."""

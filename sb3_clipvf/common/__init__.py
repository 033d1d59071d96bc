"""What every layer uses: checks of arguments, messages, versions, memory and cores, compiling, finite checks."""

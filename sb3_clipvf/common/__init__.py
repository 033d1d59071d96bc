"""
What every layer uses. Its modules import nothing else of the package.

- ``validation``: checks of what users pass, and their error messages;
- ``messages``: the logger, and warnings;
- ``nonfinite``: checks for non-finite numbers, and their errors;
- ``observations``: observations by key, arrays or tensors;
- ``tensors``: torch's counterparts of NumPy's arrays and dtypes;
- ``jit``: decorators that compile functions;
- ``resources``: memory and cores that this process may use;
- ``versions``: versions of packages.
"""

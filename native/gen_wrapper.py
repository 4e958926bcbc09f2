"""Write the C source of the extension from the API's header: gen_wrapper.py HEADER OUTPUT (run by CMake)."""

import sys
from pathlib import Path

from cffi import FFI

header, output = Path(sys.argv[1]), Path(sys.argv[2])
builder = FFI()
builder.cdef(header.read_text())
builder.set_source("nbdvvol.dataplane._native", '#include "nbdvvol.h"')
builder.emit_c_code(str(output))

#!/usr/bin/env python3
"""Writes quant/grid_data.h: the points of the grids that GGUF's IQ1, IQ2 and IQ3 types choose from,
as the public gguf package has them, each point packed into 12 or 16 bits.

    python3 tests/make_grid_data.py quant/grid_data.h        (needs PyPI `gguf` and numpy)
"""
import sys
from importlib.metadata import version

import gguf.quants as q

HEAD = """/* quant/grid_data.h - the points of the grids of IQ1, IQ2 and IQ3 (grid.h). Made by
 * tests/make_grid_data.py from the `gguf` package {version}; do not edit.
 *
 * A list is GRID_x(R): a sequence of R(8 points). A point of 8 weights has 2 bits for each, one
 * of 4 weights 3 bits; the first weight has the lowest. They are places in the grid's values. */
#ifndef MOE_QUANT_GRID_DATA_H
#define MOE_QUANT_GRID_DATA_H
"""


def points(kind):
    kind.init_grid()
    n, length = kind.grid_shape
    bits = 16 // length if length == 8 else 3
    grid = kind.grid.reshape(n, length)
    values = list(kind.grid_map)
    return [sum(values.index(int(v)) << bits * i for i, v in enumerate(row)) for row in grid]


def main():
    out = [HEAD.format(version=version("gguf"))]
    for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"):
        kind = getattr(q, name)
        values = ", ".join(str(v) for v in kind.grid_map)
        label = "IQ1" if name == "IQ1_S" else name
        out.append(f"/* {kind.grid_shape[0]} points of {kind.grid_shape[1]} weights: {values} */")
        rows = points(kind)
        lines = [f"    R({', '.join(f'{v:#06x}' for v in rows[i:i + 8])})"
                 for i in range(0, len(rows), 8)]
        width = max(map(len, lines)) + 1
        out.append(f"#define GRID_{label}(R)".ljust(width) + "\\")
        out += [line.ljust(width) + "\\" for line in lines[:-1]] + [lines[-1], ""]
    out.append("#endif")
    with open(sys.argv[1], "w", encoding="utf-8") as f:
        f.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()

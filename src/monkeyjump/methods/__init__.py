"""The methods that can be compared: what each trains, how many parameters, what routes it, who says so.

    method("moelora")                          a row of the table
    method("mj-lora").config(r=2, ...)         its config, for get_peft_model

formula.py   parameter counts as formulas
row.py       what a row says
table.py     one row per method
"""

from monkeyjump.methods.formula import Block, Formula
from monkeyjump.methods.row import Method, Table4
from monkeyjump.methods.table import METHODS, method

__all__ = ["METHODS", "Block", "Formula", "Method", "Table4", "method"]

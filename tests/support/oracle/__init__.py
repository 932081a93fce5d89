"""What results are compared with.

The formulas written out slowly, and Triton's interpreter made strict.
"""

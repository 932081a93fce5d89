"""What results are compared with: the formulas written out slowly, and Triton's interpreter made strict."""

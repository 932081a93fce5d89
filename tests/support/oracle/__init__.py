"""What results are compared with: slow transcriptions, and Triton's interpreter made strict."""

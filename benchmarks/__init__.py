"""What UnHype costs: ratios within one run, on the machine at hand."""

"""What keeps the house in order: `check_house` (budgets, imports) and `compile_gate` (kernels without a GPU)."""

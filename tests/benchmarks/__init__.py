"""Speed and quality, measured: one module a question, all in one form (DESIGN section 6)."""

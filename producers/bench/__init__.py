"""`millpond bench`: every figure Millpond claims, measured side by side on the machine at hand."""

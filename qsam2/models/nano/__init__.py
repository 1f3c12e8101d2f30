"""nano: the small SAM2 whose weights ship in the package, and its variants."""

"""One file per change of the schema; each goes up and down."""

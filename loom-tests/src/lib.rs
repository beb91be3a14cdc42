//! The bounds that every model runs under.

//! What the sources and the documents promise about themselves.
#![allow(missing_docs, reason = "a test")]

mod coverage;
mod dependencies;
mod glossary;
mod layers;
#[cfg(feature = "sim")]
mod security;

#[path = "../support/again.rs"]
mod again;
#[path = "../support/mock.rs"]
mod mock;
#[path = "../support/names.rs"]
mod names;
#[path = "../support/pipes.rs"]
mod pipes;

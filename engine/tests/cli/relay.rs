//! The command's relay between a source and a destination that record everything: what was captured
//! between two QEMUs, a source with packets in any order, and peers that die, lie or stand still.

mod fails;
mod fed;
mod passes;
mod received;
mod sink;
mod stands;

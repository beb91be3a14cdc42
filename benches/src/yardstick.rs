//! What the engine is compared with: other ways to do the same, written to be fast.
//!
//! | yardstick | what it is |
//! |---|---|
//! | [`mutex`] | the peers' algorithm: a mutex for each device, every payload duplicated under it |
//! | [`threads`] | a thread for each device, over the engine's own slots and pool |
//! | [`whole`] | what a VMM does today: read to the end, send, write |
//! | [`local`] | each core copies and writes for devices of its own: the least work for many devices |
//! | [`handed`] | one thread copies, another writes those bytes, both spinning: the least hand-over |
//! | [`raw`] | one thread that writes, another that copies as much: the machine's limit for one device |
//! | [`copy_save`] | the peers' save: read, duplicate, queue behind one lock |

pub mod copy_save;
pub mod handed;
pub mod local;
pub mod mutex;
pub mod raw;
pub mod threads;
pub mod whole;

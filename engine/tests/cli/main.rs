//! What the command promises whoever runs it: its processes, their files, statuses and messages.
#![cfg(feature = "cli")]
#![allow(missing_docs, reason = "a test")]

mod activated;
mod chain;
mod channels;
mod connect;
mod demo;
mod doctor;
mod ended;
mod failures;
mod false_source;
mod far;
mod files;
mod interrupt;
mod json;
mod keep;
mod limits;
mod listen;
mod network;
mod observe;
mod order;
mod peers;
mod probe;
mod relay;
mod replay;
mod return_path;
mod start;
mod tls;
mod unread;
mod vanished;
mod which_side;

#[path = "../support/barrier.rs"]
mod barrier;
#[path = "../support/certificates.rs"]
mod certificates;
#[path = "../support/command.rs"]
mod command;
#[path = "../support/names.rs"]
mod names;
#[path = "../support/packets.rs"]
mod packets;
#[path = "../support/schema.rs"]
mod schema;

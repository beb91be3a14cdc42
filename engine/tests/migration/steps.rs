//! One side of a migration alone, and a step of it at a time.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
};

use vfio_migration::{
    ErrorKind, LoadSession, Violation,
    migration::{Incoming, OutgoingDevice, SwitchoverAck, SwitchoverAcks},
    section::Tag,
    sim::{SimConfig, SimHandle},
};

use crate::{
    quick::quick,
    vm::{Setup, id},
};

pub fn source(
    config: SimConfig,
    ack: SwitchoverAck,
) -> (OutgoingDevice, SimHandle, SwitchoverAcks) {
    let setup = Setup {
        ack,
        ..Setup::default()
    };
    let (migratable, handle) = setup.admit(1, config);
    let acks = SwitchoverAcks::new(ack);
    let source =
        OutgoingDevice::setup(migratable, &setup.capabilities(), &acks, io::sink()).unwrap();
    (source, handle, acks)
}

pub fn incoming(setup: &Setup) -> (Incoming, SimHandle, Arc<AtomicU32>) {
    let (migratable, handle) = setup.admit(1, setup.config(9));
    let approvals = Arc::new(AtomicU32::new(0));
    let counted = approvals.clone();
    let approve = move || {
        counted.fetch_add(1, SeqCst);
        Ok(())
    };
    let session = LoadSession::builder().settings(quick());
    let incoming = Incoming::setup(
        vec![migratable],
        &setup.capabilities(),
        session,
        Box::new(approve),
    )
    .unwrap();
    (incoming, handle, approvals)
}

/// Loads a body of these tags, and `data` behind the size of a DATA block.
pub fn load(incoming: &Incoming, tags: &[Tag], data: &[u8]) -> vfio_migration::Result<Tag> {
    let mut body = Vec::new();
    for tag in tags {
        body.extend(tag.encode());
        if *tag == Tag::Data {
            body.extend((data.len() as u64).to_be_bytes());
            body.extend(data);
        }
    }
    let piece = incoming.device(&id(1))?.load_state(&mut &body[..])?;
    Ok(piece.end)
}

pub const fn tag_of(tag: Tag) -> Violation {
    Violation::SectionTag(tag.value())
}

pub fn refused(result: vfio_migration::Result<Tag>, violation: Violation) {
    let error = result.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Protocol(violation), "{error:?}");
    assert_eq!(error.device(), Some(&id(1)));
}

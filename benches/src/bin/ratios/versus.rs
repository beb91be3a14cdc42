//! QEMU itself beside `send` and `receive`, in a guest. `.ci/guest/versus` measures; its rounds are read here.

use std::{collections::BTreeMap, fs, io};

use vfio_migration_benches::measure::Goal::{AtLeast, Open};

use crate::suite::{Found, Run, Suite};

pub const SUITES: &[Suite] = &[Suite {
    rows: &[
        ("versus-qemu-1", AtLeast(1.2)),
        ("versus-qemu-2", AtLeast(1.2)),
        ("versus-qemu-memory", AtLeast(1.5)),
        ("versus-qemu-memory-grown", Open),
        ("versus-qemu-cpu", Open),
    ],
    run: read,
}];

fn read(run: &Run) -> io::Result<Found> {
    let mut found = Found::default();
    let Some(path) = &run.beside else {
        eprintln!(
            "versus-qemu-…: not measured here: .ci/guest/versus, then --beside target/versus.json"
        );
        return Ok(found);
    };
    let rows: BTreeMap<String, Vec<f64>> = serde_json::from_str(&fs::read_to_string(path)?)?;
    for (name, values) in rows {
        found.add(name, values);
    }
    Ok(found)
}

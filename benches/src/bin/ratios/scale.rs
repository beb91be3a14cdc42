//! `--scale`: what grows with devices, channels, packets and state, and a model of other machines.
//!
//! ```text
//!   points ── each in a process of its own ──▶ scale.json ──▶ scale.svg, four columns
//!          ── one core and two ──▶ the model's inputs, and its check
//! ```
//!
//! One of the four is varied at a time; the others stay at [`BASE`]. Each point is a load from loopback TCP, both ends
//! on this machine.

use std::{fs, io, path::Path};

use vfio_migration_benches::{
    measure::Short,
    plan::Plan,
    scale::{Measured, Point, measure},
};

use crate::{
    chart, model,
    suite::{KIB, MIB},
};

/// What is not varied.
struct Base {
    devices: u32,
    channels: u32,
    packet: usize,
    state: usize,
}

const BASE: Base = Base {
    devices: 16,
    channels: 4,
    packet: 256 * KIB,
    state: 512 * MIB,
};

const DEVICES: &[u32] = &[1, 4, 16, 64, 256];
const CHANNELS: &[u32] = &[1, 2, 4, 8, 16, 32, 64];
const PACKETS: &[usize] = &[4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB];
/// Of all devices together.
const STATES: &[usize] = &[
    MIB,
    16 * MIB,
    64 * MIB,
    256 * MIB,
    1024 * MIB,
    4096 * MIB,
    8192 * MIB,
];

/// One column: what is varied, and the point of each value.
pub struct Column {
    pub name: &'static str,
    pub points: Vec<(f64, Measured)>,
}

/// Measures all, tells, and writes `scale.json` and `scale.svg` into `out`.
pub fn run(out: &Path, quick: bool) -> io::Result<()> {
    let columns = columns(quick)?;
    for column in &columns {
        println!(
            "{:>12} {:>8} {:>14} {:>10}",
            column.name, "GB/s", "CPU s/GiB", "peak MiB"
        );
        for (value, measured) in &column.points {
            println!(
                "{:>12} {:>8} {:>14} {:>10}",
                value,
                Short(measured.rate / 1e9),
                Short(measured.cpu_per_gib),
                measured.peak >> 20
            );
        }
    }
    let checks = model::measure(quick)?;
    model::print(&checks);
    fs::create_dir_all(out)?;
    let all: Vec<&Measured> = columns
        .iter()
        .flat_map(|column| column.points.iter().map(|(_, measured)| measured))
        .chain(&checks)
        .collect();
    fs::write(out.join("scale.json"), serde_json::to_string_pretty(&all)?)?;
    chart::draw(&columns, &out.join("scale.svg"))?;
    println!("written: {0}/scale.json, {0}/scale.svg", out.display());
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a place in a chart")]
fn columns(quick: bool) -> io::Result<Vec<Column>> {
    let base_state = if quick { 32 * MIB } else { BASE.state };
    let column = |name, plans: Vec<(f64, Plan)>| -> io::Result<Column> {
        let mut points = Vec::new();
        for (value, plan) in plans {
            if !fits(plan.bytes())? {
                println!("{name} {value}: left out: this machine has no memory for it");
                continue;
            }
            let rounds = if quick { 1 } else { 3 };
            let point = Point {
                plan,
                cores: 0,
                rounds,
            };
            points.push((value, measure(point)?));
        }
        Ok(Column { name, points })
    };
    let plan = |devices, channels, packet, state| Plan::of_bytes(devices, channels, packet, state);
    let devices = DEVICES.iter().map(|&devices| {
        // Each has a few packets at least.
        let packet = BASE.packet.min(base_state / devices as usize / 2);
        let plan = plan(devices, BASE.channels, packet, base_state);
        (f64::from(devices), plan)
    });
    let channels = CHANNELS.iter().map(|&channels| {
        let plan = plan(BASE.devices, channels, BASE.packet, base_state);
        (f64::from(channels), plan)
    });
    let packets = PACKETS.iter().map(|&packet| {
        let devices = BASE
            .devices
            .min(u32::try_from(base_state / packet).unwrap_or(1));
        let plan = plan(devices, BASE.channels, packet, base_state);
        ((packet / KIB) as f64, plan)
    });
    let states = STATES.iter().filter(|&&state| !quick || state <= 64 * MIB);
    let states = states.map(|&state| {
        let packet = BASE.packet.min(state / BASE.devices as usize);
        let plan = plan(BASE.devices, BASE.channels, packet, state);
        ((state / MIB) as f64, plan)
    });
    Ok(vec![
        column("devices", devices.collect())?,
        column("channels", channels.collect())?,
        column("packet KiB", packets.collect())?,
        column("state MiB", states.collect())?,
    ])
}

/// Whether the machine has half as much again to spare.
fn fits(bytes: u64) -> io::Result<bool> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    let kib = kib.ok_or_else(|| io::Error::other("no MemAvailable"))?;
    Ok(bytes * 3 / 2 < kib << 10)
}

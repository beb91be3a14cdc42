//! A model of other machines: what each thread takes for a packet, added up.
//!
//! ```text
//!   rate = the least of   the network
//!                         cores    / what all threads take for a byte
//!                         channels / what a channel's thread takes      (at most a core each)
//!                         1        / what the I/O thread takes
//!                         devices  / what the kernel's worker takes     (one device's bytes go in order)
//! ```
//!
//! The inputs are measured on this machine: CPU time by role, of a load from loopback TCP. The model is checked
//! where it can be, on one core and on two with both ends on the same cores. Beyond that it is a model: memory
//! bandwidth, sockets of several NUMA nodes and the interrupts of a real network card are not in it.

use std::io;

use vfio_migration_benches::{
    measure::Short,
    plan::Plan,
    roles::Roles,
    scale::{Measured, Point, measure as measure_point},
};

use crate::suite::{KIB, MIB};

/// Packets that the model is made for.
const PACKETS: &[usize] = &[4 * KIB, 64 * KIB, MIB];
const DEVICES: u32 = 16;
const CHANNELS: u32 = 4;
/// Of other machines.
const CORES: &[f64] = &[4.0, 16.0, 64.0];
/// Gb/s.
const NETWORKS: &[f64] = &[25.0, 100.0, 200.0, 400.0];

/// Each size of packet, on two cores and on one.
pub fn measure(quick: bool) -> io::Result<Vec<Measured>> {
    let state = if quick { 32 * MIB } else { 512 * MIB };
    let mut found = Vec::new();
    for &packet in PACKETS {
        for cores in [2, 1] {
            found.push(measure_point(Point {
                plan: Plan::of_bytes(DEVICES, CHANNELS, packet, state),
                cores,
                rounds: if quick { 1 } else { 3 },
            })?);
        }
    }
    Ok(found)
}

/// A machine.
struct Machine {
    cores: f64,
    channels: f64,
    devices: f64,
    /// Bytes a second.
    network: f64,
}

const GIB: f64 = (1_u32 << 30) as f64;

/// Bytes a second, and what bounds them. `roles` is CPU seconds for each GiB; `all` is what runs on these cores.
fn predict(roles: &Roles, all: f64, machine: &Machine) -> (f64, &'static str) {
    let rate = |threads: f64, took: f64| threads.min(machine.cores) * GIB / took.max(1e-9);
    let bounds = [
        (machine.network, "network"),
        (machine.cores * GIB / all, "cores"),
        (rate(machine.channels, roles.channel), "channels"),
        (rate(1.0, roles.io), "I/O thread"),
        (rate(machine.devices, roles.worker), "devices"),
    ];
    let least = bounds.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
    least.expect("there are several")
}

/// What each step costs, the check, the model.
#[expect(clippy::cast_precision_loss, reason = "a figure for a human")]
pub fn print(measured: &[Measured]) {
    println!(
        "\nCPU time of a packet, by thread, in µs (two cores, loopback TCP, {DEVICES} devices)"
    );
    println!(
        "| packet | channel: receive, check, publish | I/O thread: take, submit, complete, recycle | kernel's worker: write | everybody else | other end |"
    );
    println!("|---|---|---|---|---|---|");
    let two_cores = || measured.iter().filter(|measured| measured.point.cores == 2);
    for at in two_cores() {
        let packets = GIB / at.point.plan.packet as f64;
        let us = at.roles.for_each(packets / 1e6);
        println!(
            "| {} | {} | {} | {} | {} | {} |",
            size(at.point.plan.packet),
            Short(us.channel),
            Short(us.io),
            Short(us.worker),
            Short(us.other),
            Short(us.feeder),
        );
    }
    println!("\nThe model's check, both ends on the same cores: GB/s");
    println!("| packet | cores | measured | model | model / measured |");
    println!("|---|---|---|---|---|");
    for at in measured {
        let plan = at.point.plan;
        // What two cores took is what the model knows.
        let known = two_cores().find(|two| two.point.plan.packet == plan.packet);
        let roles = known.map_or(at.roles, |two| two.roles);
        let machine = Machine {
            cores: at.point.cores as f64,
            channels: f64::from(plan.channels),
            devices: f64::from(plan.devices),
            network: f64::INFINITY,
        };
        let (rate, _) = predict(&roles, roles.all(), &machine);
        println!(
            "| {} | {} | {} | {} | {} |",
            size(plan.packet),
            at.point.cores,
            Short(at.rate / 1e9),
            Short(rate / 1e9),
            Short(rate / at.rate),
        );
    }
    println!(
        "\nMODEL, not measured: GB/s of a destination alone, {DEVICES} devices, a channel for each core up to 16"
    );
    let networks: Vec<_> = NETWORKS.iter().map(|gb| format!("{gb} Gb/s")).collect();
    println!("| packet | cores | {} |", networks.join(" | "));
    println!("|---|---|{}", "---|".repeat(NETWORKS.len()));
    for at in two_cores() {
        for &cores in CORES {
            let cells: Vec<_> = NETWORKS
                .iter()
                .map(|network| {
                    let machine = Machine {
                        cores,
                        channels: cores.min(16.0),
                        devices: f64::from(DEVICES),
                        network: network * 1e9 / 8.0,
                    };
                    let (rate, by) = predict(&at.roles, at.roles.destination(), &machine);
                    format!("{} ({by})", Short(rate / 1e9))
                })
                .collect();
            println!(
                "| {} | {cores} | {} |",
                size(at.point.plan.packet),
                cells.join(" | ")
            );
        }
    }
}

fn size(bytes: usize) -> String {
    if bytes < MIB {
        format!("{} KiB", bytes / KIB)
    } else {
        format!("{} MiB", bytes / MIB)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scarcest_bounds_the_rate() {
        let roles = Roles {
            channel: 0.4,
            io: 0.1,
            worker: 0.2,
            feeder: 0.3,
            other: 0.0,
        };
        let machine = |cores, network| Machine {
            cores,
            channels: 4.0,
            devices: 16.0,
            network,
        };
        let on = |cores, network| predict(&roles, roles.destination(), &machine(cores, network));
        let (rate, by) = on(1.0, f64::INFINITY);
        assert_eq!(by, "cores");
        assert!((rate - GIB / 0.7).abs() < 1.0);
        // Many cores: four channels are ten times what one second gives, and so is the one I/O thread.
        assert!(matches!(
            on(64.0, f64::INFINITY),
            (_, "channels" | "I/O thread")
        ));
        assert_eq!(on(64.0, 1e9), (1e9, "network"));
    }
}

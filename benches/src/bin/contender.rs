//! One contender alone, round by round: for profilers, and for comparing two builds of the engine.
//!
//! ```sh
//! cargo run --release -p vfio-migration-benches --bin contender -- engine --devices 64 --packet 65536
//! ```

use std::io;

use clap::{Parser, ValueEnum};
use vfio_migration_benches::{
    engine,
    plan::Plan,
    sink::{Kind, Sink},
    source::{Source, Wire},
    yardstick::{copy_save, handed, local, mutex, raw, threads},
};

/// Who moves the bytes.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Contender {
    Engine,
    EngineTcp,
    EngineSave,
    Mutex,
    MutexTcp,
    Threads,
    Local,
    Handed,
    Raw,
    RawTcp,
    ThroughTcp,
    RawSave,
    LocalSave,
    CopySave,
}

/// Where to.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum To {
    Memfd,
    PlainWrite,
    Null,
}

/// Runs one contender and prints its rate in GB/s, a line for each round.
#[derive(Debug, Parser)]
struct Arguments {
    contender: Contender,
    #[arg(long, value_enum, default_value = "memfd")]
    to: To,
    #[arg(long, default_value_t = 1)]
    devices: u32,
    #[arg(long, default_value_t = 4)]
    channels: u32,
    /// Bytes of data in a packet.
    #[arg(long, default_value_t = 1 << 20)]
    packet: usize,
    /// Bytes of a round, in MiB.
    #[arg(long, default_value_t = 512)]
    mib: usize,
    /// The engine's budget, in MiB.
    #[arg(long)]
    budget: Option<usize>,
    /// Which thread writes to a device: the default unless given.
    #[arg(long, value_enum)]
    writer: Option<engine::WriterArgument>,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Prints CPU seconds for each GiB and page faults too.
    #[arg(long)]
    verbose: bool,
}

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    if let Some(writer) = arguments.writer {
        engine::write_by(writer.into());
    }
    let plan = Plan::of_bytes(
        arguments.devices,
        arguments.channels,
        arguments.packet,
        arguments.mib << 20,
    );
    let kind = match arguments.to {
        To::Memfd => Kind::Memfd,
        To::PlainWrite => Kind::PlainWrite,
        To::Null => Kind::Null,
    };
    let sinks = Sink::several(kind, plan.devices, plan.device_bytes())?;
    let source = Source::new(plan.packet);
    let settings = || {
        let mut settings = engine::settings();
        settings.budget = arguments.budget.map(|mib| mib << 20);
        settings
    };
    for _ in 0..arguments.rounds {
        let sample = match arguments.contender {
            Contender::Engine => engine::load_memory(&plan, &sinks, &source, settings()).sample,
            Contender::EngineTcp => {
                engine::load_sockets(&plan, &sinks, &source, Wire::Tcp, settings()).sample
            }
            Contender::EngineSave => engine::save_null(&plan, &sinks).sample,
            Contender::Mutex => mutex::load_memory(&plan, &sinks, &source),
            Contender::MutexTcp => mutex::load_sockets(&plan, &sinks, &source, Wire::Tcp),
            Contender::Threads => threads::load_memory(&plan, &sinks, &source),
            Contender::Local => local::load_memory(&plan, &sinks, &source),
            Contender::Handed => handed::load_memory(&plan, &sinks[0], &source),
            Contender::Raw => raw::load_memory(&plan, &sinks[0], &source),
            Contender::RawTcp => raw::load_sockets(&plan, &sinks[0], &source, Wire::Tcp),
            Contender::ThroughTcp => {
                raw::load_sockets_through(&plan, &sinks[0], &source, Wire::Tcp)
            }
            Contender::RawSave => raw::save(&plan, &sinks[0], 1),
            Contender::LocalSave => local::save(&plan, &sinks),
            Contender::CopySave => copy_save::save(&plan, &sinks),
        };
        let (rate, cpu) = (sample.rate() / 1e9, sample.cpu_per_gib());
        if arguments.verbose {
            println!(
                "{rate:.3} GB/s, {cpu:.3} CPU s/GiB, {} faults",
                sample.faults
            );
        } else {
            println!("{rate:.3}");
        }
    }
    Ok(())
}

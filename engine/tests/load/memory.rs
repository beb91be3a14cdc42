//! What a destination's memory is bounded by: its budget, whatever the order of the packets.
//!
//! Each case runs in a process of its own, which receives 4 GiB at default settings through framed
//! channels whose bytes are made as they are read, into devices that read them and keep nothing.
//! The kernel says how much memory that process ever had.

use std::{
    env, fs,
    io::{self, Read},
    thread,
};

use vfio_migration::{
    Channel, Device, DeviceId, FdDevice, LoadSession, Settings, Spill,
    wire::{DeviceKey, Hello, encode_packet, wrap_config},
};

use crate::again::again;

const TOTAL: u64 = 4 << 30;
const DEVICES: u32 = 2;
const CHANNELS: u32 = 4;
const SLACK_KIB: u64 = 16 << 10;
const BUDGET_KIB: u64 = 32 << 10;
const CASE: &str = "VFIO_MIGRATION_MEMORY_CASE";

/// A device whose data fd is a pipe that a thread of its own drains.
fn drain() -> FdDevice {
    FdDevice::new(|_state| {
        let (mut reader, writer) = io::pipe()?;
        thread::spawn(move || {
            let mut bytes = vec![0; 1 << 20];
            while reader.read(&mut bytes).expect("a pipe") > 0 {}
        });
        Ok(writer.into())
    })
}

fn id(device: u32) -> DeviceId {
    DeviceId::new(format!("device {device}"), 0).unwrap()
}

/// How the packets are spread over the channels.
#[derive(Clone, Copy)]
enum Order {
    /// One after the other to each channel in turn.
    Turns,
    /// Each channel has a quarter of each device: three of them can do nothing but wait.
    Quarters,
    /// A few of one device, then a few of the other, and the last channel is far behind.
    Late,
}

/// One channel's bytes, made as they are read.
struct Made {
    packets: Box<dyn Iterator<Item = (u32, u32)> + Send>,
    data_len: usize,
    count: u32,
    head: Vec<u8>,
    at: usize,
    left: usize,
}

impl Read for Made {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.at == self.head.len() && self.left == 0 {
            let Some((device, index)) = self.packets.next() else {
                return Ok(0);
            };
            let key = DeviceKey::new(&id(device));
            self.at = 0;
            if index == self.count {
                let config = wrap_config(b"");
                let len = u32::try_from(config.len()).unwrap();
                self.head = encode_packet(&key, index, true, len).to_vec();
                self.head.extend(config);
            } else {
                let len = u32::try_from(self.data_len).unwrap();
                self.head = encode_packet(&key, index, false, len).to_vec();
                self.left = self.data_len;
            }
        }
        if self.at < self.head.len() {
            let count = bytes.len().min(self.head.len() - self.at);
            bytes[..count].copy_from_slice(&self.head[self.at..self.at + count]);
            self.at += count;
            return Ok(count);
        }
        let count = bytes.len().min(self.left);
        bytes[..count].fill(7);
        self.left -= count;
        Ok(count)
    }
}

fn channel(number: u32, order: Order, data_len: usize) -> Made {
    let count = u32::try_from(TOTAL / u64::from(DEVICES) / data_len as u64).unwrap();
    // The last of each device is its config packet.
    let all = (0..=count).flat_map(|index| (0..DEVICES).map(move |device| (device, index)));
    let quarter = count / CHANNELS + 1;
    let packets: Box<dyn Iterator<Item = (u32, u32)> + Send> = match order {
        Order::Turns => Box::new(
            all.filter(move |(device, index)| (index * DEVICES + device) % CHANNELS == number),
        ),
        Order::Quarters => Box::new(all.filter(move |(_, index)| index / quarter == number)),
        Order::Late => Box::new(all.filter(move |(device, index)| {
            let run = index / 7 + device;
            let owner = if run % 11 == 0 {
                CHANNELS - 1
            } else {
                run % (CHANNELS - 1)
            };
            owner == number
        })),
    };
    let id = u8::try_from(number).unwrap();
    Made {
        packets,
        data_len,
        count,
        head: Hello { uuid: [0; 16], id }.encode().to_vec(),
        at: 0,
        left: 0,
    }
}

/// The most memory that this process ever had, in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let words = line.unwrap().split_whitespace().nth(1);
    words.unwrap().parse().unwrap()
}

fn receive(order: Order, data_len: usize) {
    let mut load = LoadSession::builder().settings(Settings::default());
    for device in 0..DEVICES {
        let device = Device::new(id(device), Box::new(drain()));
        load = load.device(device.unwrap());
    }
    for number in 0..CHANNELS {
        load = load.channel(Channel::from_reader(channel(number, order, data_len)));
    }
    let load = load.start().unwrap();
    load.switchover_start();
    let report = load.join();
    report.result.unwrap();
    let bytes: u64 = report.stats.devices.iter().map(|device| device.bytes).sum();
    assert!(bytes > TOTAL);
    assert!(report.stats.held_high <= report.stats.budget);
    assert_eq!(report.stats.budget, BUDGET_KIB << 10);
    let used = peak();
    println!("peak {used} KiB, budget {BUDGET_KIB} KiB");
    assert!(used <= BUDGET_KIB + SLACK_KIB, "{used} KiB");
    // No channel has a RAM sink: nothing is spilled.
    let mut settings = Settings::default();
    settings.spill = Spill::Off;
    let bound = settings.memory_bound(DEVICES, CHANNELS).unwrap().total();
    assert!(used << 10 <= bound, "{used} KiB, above {bound} bytes");
}

#[test]
fn four_gib_stay_within_the_budget_and_16_mib() {
    let cases = [
        ("turns-1m", Order::Turns, 1 << 20),
        ("quarters-1m", Order::Quarters, 1 << 20),
        ("late-64k", Order::Late, 64 << 10),
        ("quarters-16k", Order::Quarters, 16 << 10),
    ];
    if let Ok(name) = env::var(CASE) {
        let (_, order, data_len) = cases.into_iter().find(|case| case.0 == name).unwrap();
        return receive(order, data_len);
    }
    for (name, ..) in cases {
        let output = again(module_path!(), "four_gib_stay_within_the_budget_and_16_mib")
            .env(CASE, name)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {text}{error}");
        let line = text.lines().find(|line| line.contains("peak")).unwrap();
        println!("{name}: {line}");
    }
}

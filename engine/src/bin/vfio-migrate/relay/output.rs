//! What `relay` prints: the packets of each device and channel that it has passed on.

use serde::Serialize;
use vfio_migration::Stats;

use crate::output;

#[derive(Serialize)]
struct DeviceOutput {
    idstr: String,
    instance: u32,
    /// The config packet included.
    packets: u64,
    /// The 12-byte packet headers included.
    bytes: u64,
}

#[derive(Serialize)]
struct ChannelOutput {
    channel: u32,
    /// Device-state packets that came in on it, and their bytes.
    packets: u64,
    bytes: u64,
    ram_packets: u64,
    syncs: u64,
}

#[derive(Serialize)]
pub(super) struct Output {
    role: &'static str,
    devices: Vec<DeviceOutput>,
    channels: Vec<ChannelOutput>,
    /// Bytes of the main channel; none where it went another way.
    main_to_destination: Option<u64>,
    main_to_source: Option<u64>,
    budget: u64,
    held_high: u64,
    late_wakeups: u64,
}

impl Output {
    pub(super) fn new(stats: &Stats, main: Option<[u64; 2]>) -> Self {
        let devices = stats.devices.iter().map(|device| DeviceOutput {
            idstr: device.device.idstr().to_owned(),
            instance: device.device.instance(),
            packets: device.packets,
            bytes: device.bytes,
        });
        let channels = stats.channels.iter().map(|channel| ChannelOutput {
            channel: channel.channel,
            packets: channel.packets,
            bytes: channel.bytes,
            ram_packets: channel.ram_packets,
            syncs: channel.syncs,
        });
        Self {
            role: "relay",
            devices: devices.collect(),
            channels: channels.collect(),
            main_to_destination: main.map(|[there, _]| there),
            main_to_source: main.map(|[_, back]| back),
            budget: stats.budget,
            held_high: stats.held_high,
            late_wakeups: stats.late_wakeups,
        }
    }

    pub(super) fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            return output::print_json(self);
        }
        let mut text = String::new();
        for device in &self.devices {
            text.push_str(&format!(
                "{:?}, instance {}: {} packets, {} bytes\n",
                device.idstr, device.instance, device.packets, device.bytes
            ));
        }
        if self.devices.is_empty() {
            text.push_str("no device's packets\n");
        }
        let rows = self.channels.iter().map(|channel| {
            vec![
                channel.channel.to_string(),
                channel.packets.to_string(),
                channel.bytes.to_string(),
                channel.ram_packets.to_string(),
                channel.syncs.to_string(),
            ]
        });
        let rows: Vec<Vec<String>> = rows.collect();
        text.push('\n');
        text.push_str(&output::table(
            &["channel", "device packets", "bytes", "RAM", "SYNC"],
            &rows,
        ));
        if let (Some(there), Some(back)) = (self.main_to_destination, self.main_to_source) {
            text.push_str(&format!(
                "main channel: {there} bytes to the destination, {back} bytes back\n"
            ));
        }
        output::print(&text)
    }
}

//! What `relay` prints: the packets of each device and channel that it has passed on.

use serde::Serialize;
use vfio_migration::Stats;

use crate::{
    json,
    moved::{self, Channel, Totals},
    output,
};

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
pub(super) struct Output {
    devices: Vec<DeviceOutput>,
    channels: Vec<Channel>,
    totals: Totals,
    /// Bytes of the main channel; none where it went another way.
    #[serde(skip_serializing_if = "Option::is_none")]
    main_to_destination: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    main_to_source: Option<u64>,
}

impl Output {
    pub(super) fn new(stats: &Stats, main: Option<[u64; 2]>) -> Self {
        let devices = stats.devices.iter().map(|device| DeviceOutput {
            idstr: device.device.idstr().to_owned(),
            instance: device.device.instance(),
            packets: device.packets,
            bytes: device.bytes,
        });
        Self {
            devices: devices.collect(),
            channels: moved::channels(stats),
            totals: Totals::new(stats, None),
            main_to_destination: main.map(|[there, _]| there),
            main_to_source: main.map(|[_, back]| back),
        }
    }

    pub(super) fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            return json::print(self);
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
        text.push('\n');
        text.push_str(&moved::channel_table(&self.channels));
        if let (Some(there), Some(back)) = (self.main_to_destination, self.main_to_source) {
            text.push_str(&format!(
                "main channel: {there} bytes to the destination, {back} bytes back\n"
            ));
        }
        output::print(&text)
    }
}

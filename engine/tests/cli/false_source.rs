//! What a source says, in words of a test's own, so that it can be wrong.

use std::{io::Write, net::TcpStream};

use vfio_migration::{
    DeviceId, section,
    stream::{Event, Section, SectionKind, Writer},
    wire::{DeviceKey, Hello, PageSize, encode_packet, encode_sync, wrap_config},
};

pub fn device(name: &str) -> DeviceId {
    DeviceId::new(name, 0).unwrap()
}

/// A multifd channel, greeted, with the SYNC that comes first.
pub fn channel(to: &str, number: u8) -> TcpStream {
    let hello = Hello {
        uuid: [0; 16],
        id: number,
    };
    let sync = encode_sync(PageSize::new(4096).unwrap(), 0);
    let mut channel = TcpStream::connect(to).unwrap();
    let bytes = [&hello.encode()[..], &sync].concat();
    channel.write_all(&bytes).unwrap();
    channel
}

fn write(channel: &mut TcpStream, name: &str, index: u32, config: bool, data: &[u8]) {
    let len = u32::try_from(data.len()).unwrap();
    let header = encode_packet(&DeviceKey::new(&device(name)), index, config, len);
    channel.write_all(&[&header[..], data].concat()).unwrap();
}

/// A packet of a device's state.
pub fn packet(channel: &mut TcpStream, name: &str, index: u32, data: &[u8]) {
    write(channel, name, index, false, data);
}

/// A device's config packet.
pub fn config(channel: &mut TcpStream, name: &str, index: u32) {
    write(channel, name, index, true, &wrap_config(b"config"));
}

/// A section of a device on the main channel.
pub fn section(
    main: &mut Writer<TcpStream>,
    section: Section,
    body: impl FnOnce(&mut section::Writer<&mut TcpStream>),
) {
    let id = section.id;
    main.write(&Event::Section(section)).unwrap();
    let mut writer = section::Writer::new(main.body());
    body(&mut writer);
    writer.end().unwrap();
    main.footer(id).unwrap();
}

/// As [`section`], as it is for the only device.
pub fn section_of(
    main: &mut Writer<TcpStream>,
    name: &str,
    kind: SectionKind,
    body: impl FnOnce(&mut section::Writer<&mut TcpStream>),
) {
    let of = Section {
        kind,
        id: 1,
        owner: device(name),
        version: 1,
    };
    section(main, of, body);
}

/// The only device's last sections, and the end of the VM's state.
pub fn end(main: &mut Writer<TcpStream>, name: &str) {
    section_of(main, name, SectionKind::End, |_| {});
    section_of(main, name, SectionKind::Full, |_| {});
    main.write(&Event::Eof).unwrap();
    main.write(&Event::Description(b"{}".to_vec())).unwrap();
}

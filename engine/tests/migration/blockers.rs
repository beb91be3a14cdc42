//! Which devices may be migrated: every refusal with its reason, by each setting.

use std::io;

use nix::errno::Errno;
use vfio_migration::{
    DeviceId, ErrorKind, MigrationDevice, MigrationFlags, Refusal,
    migration::{Admitted, DeviceSettings, MigrationBlockers, OnOffAuto, PlatformSupport},
    sim::{CallFault, Callback, Fault, Faults, SimConfig, SimDevice, Which},
};

fn id(number: u32) -> DeviceId {
    DeviceId::new("vfio", number).unwrap()
}

fn device(flags: u64, answer: Option<Errno>) -> Box<dyn MigrationDevice> {
    let calls = answer.map(|errno| CallFault {
        callback: Callback::Flags,
        which: Which::Every,
        fault: Fault::Errno(errno as i32),
    });
    Box::new(
        SimDevice::new(SimConfig {
            flags: MigrationFlags::from_bits(flags),
            faults: Faults {
                calls: calls.into_iter().collect(),
                ..Faults::default()
            },
            ..SimConfig::default()
        })
        .unwrap(),
    )
}

fn settings(enable: OnOffAuto) -> DeviceSettings {
    let mut settings = DeviceSettings::default();
    settings.enable = enable;
    settings
}

fn around() -> PlatformSupport {
    let mut around = PlatformSupport::default();
    around.device_dirty_tracking = true;
    around
}

#[test]
fn what_speaks_against_a_device_blocks_its_vm_or_fails_where_the_setting_is_on() {
    let mut untracked = around();
    untracked.device_dirty_tracking = false;
    let mut viommu = around();
    viommu.viommu = true;
    let cases = [
        (7, Some(Errno::ENOTTY), around(), Refusal::NoKernelSupport),
        (7, Some(Errno::EINVAL), around(), Refusal::NoDeviceSupport),
        (2, None, around(), Refusal::NoDeviceSupport),
        (7, None, untracked, Refusal::NoDirtyTracking),
        (7, None, viommu, Refusal::Viommu),
    ];
    for (flags, answer, around, refusal) in cases {
        for enable in [OnOffAuto::Auto, OnOffAuto::Off, OnOffAuto::On] {
            let mut vm = MigrationBlockers::default();
            let mut blocked = Vec::new();
            let realization = vm.admit(
                id(0),
                device(flags, answer),
                &settings(enable),
                around,
                &mut |id, refusal| {
                    blocked.push((id.clone(), refusal));
                    Ok(())
                },
            );
            let blockers: Vec<_> = vm.blockers().collect();
            match (enable, realization) {
                // Only a warning.
                (OnOffAuto::On, Ok(Admitted::Migratable(_))) => {
                    assert_eq!(refusal, Refusal::NoDirtyTracking);
                    assert!(blocked.is_empty() && blockers.is_empty());
                }
                (OnOffAuto::On, Err(failed)) => {
                    assert_ne!(refusal, Refusal::NoDirtyTracking);
                    assert_eq!(*failed.error.kind(), ErrorKind::Unmigratable(refusal));
                    assert_eq!(failed.error.device(), Some(&id(0)));
                    assert!(blocked.is_empty() && blockers.is_empty());
                }
                (enable, Ok(Admitted::Blocked(_, why))) => {
                    let expected = match enable {
                        OnOffAuto::Off => Refusal::SwitchedOff,
                        _ => refusal,
                    };
                    assert_eq!(why, expected);
                    assert_eq!(blocked, [(id(0), expected)]);
                    assert_eq!(blockers, [(&id(0), expected)]);
                }
                (_, realization) => panic!("{enable:?} {refusal}: {realization:?}"),
            }
        }
    }
}

#[test]
fn a_setting_for_dirty_tracking_that_is_off_leaves_the_iommus() {
    for (iommu, migratable) in [(false, false), (true, true)] {
        let mut off = settings(OnOffAuto::Auto);
        off.dirty_tracking = false;
        let mut around = around();
        around.iommu_dirty_tracking = iommu;
        let mut vm = MigrationBlockers::default();
        let realization = vm.admit(id(0), device(7, None), &off, around, &mut |_, _| Ok(()));
        let is = matches!(realization.unwrap(), Admitted::Migratable(_));
        assert_eq!(is, migratable);
    }
}

#[test]
fn several_devices_are_migrated_together_only_where_each_has_p2p() {
    let mut vm = MigrationBlockers::default();
    let mut realize = |number, flags, enable, blocked: &mut Vec<Refusal>| {
        vm.admit(
            id(number),
            device(flags, None),
            &settings(enable),
            around(),
            &mut |_, refusal| {
                blocked.push(refusal);
                Ok(())
            },
        )
    };
    let mut blocked = Vec::new();
    // Alone it may go.
    let first = realize(1, 1, OnOffAuto::On, &mut blocked).unwrap();
    assert!(matches!(first, Admitted::Migratable(_)));
    assert!(blocked.is_empty());
    // A second one that insists is refused.
    let failed = realize(2, 7, OnOffAuto::On, &mut blocked).unwrap_err();
    let kind = ErrorKind::Unmigratable(Refusal::SeveralWithoutP2p);
    assert_eq!(*failed.error.kind(), kind);
    // One that does not works, and blocks the VM.
    let second = realize(2, 7, OnOffAuto::Auto, &mut blocked).unwrap();
    assert!(matches!(second, Admitted::Migratable(_)));
    assert_eq!(blocked, [Refusal::SeveralWithoutP2p]);
    let blockers: Vec<_> = vm.blockers().collect();
    assert_eq!(blockers, [(&id(1), Refusal::SeveralWithoutP2p)]);
    // Whichever goes, the other is alone.
    assert!(vm.remove(&id(1)));
    assert!(!vm.remove(&id(1)));
    assert!(vm.blockers().next().is_none());
}

#[test]
fn a_blocker_that_cannot_be_registered_fails_the_realization() {
    let mut vm = MigrationBlockers::default();
    let mut failed = vm
        .admit(
            id(0),
            device(7, Some(Errno::ENOTTY)),
            &settings(OnOffAuto::Auto),
            around(),
            &mut |_, _| Err(io::ErrorKind::ResourceBusy.into()),
        )
        .unwrap_err();
    assert_eq!(*failed.error.kind(), ErrorKind::Host);
    assert!(vm.blockers().next().is_none());
    // The device itself has come back.
    assert!(failed.back_mut().state().is_ok());
}

#[test]
fn two_devices_of_one_name_are_refused() {
    let mut vm = MigrationBlockers::default();
    let mut realize = || {
        let settings = settings(OnOffAuto::Auto);
        vm.admit(id(0), device(7, None), &settings, around(), &mut |_, _| {
            Ok(())
        })
    };
    let _first = realize().unwrap();
    let failed = realize().unwrap_err();
    assert!(matches!(failed.error.kind(), ErrorKind::Misuse(_)));
}

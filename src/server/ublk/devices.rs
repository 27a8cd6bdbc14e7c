//! One device for each export, as one server.

use std::sync::Arc;

use super::device::{Device, Ends, InUse};
use super::{Options, merged, process};
use crate::backend::Kind;
use crate::error::{Error, Result};
use crate::server::{Export, Server};

/// The block devices of one process, in the order of its exports.
#[derive(Debug)]
pub struct Devices {
    devices: Vec<(Export, Device)>,
    ends: Arc<Ends>,
}

impl Devices {
    pub(super) fn start(exports: &[Export], options: &Options) -> Result<Self> {
        if options.dev_id.is_some() && exports.len() > 1 {
            return Err(Error::invalid("a device number is for one image"));
        }
        if process::leave_mount_namespace()?
            && let (true, Some(id)) = (options.recover, options.dev_id)
        {
            process::let_go_of(&format!("ublkb{id}"));
        }
        let ends = Arc::default();
        let mut devices = Vec::with_capacity(exports.len());
        for export in exports {
            let device = Device::start(export, options, &ends)?;
            devices.push((export.clone(), device));
        }
        Ok(Self { devices, ends })
    }

    fn of(&self, export: &Export) -> Result<&Device> {
        let same = |found: &&(Export, Device)| Arc::ptr_eq(&found.0.backend, &export.backend);
        match self.devices.iter().find(same) {
            Some((_, device)) => Ok(device),
            None => Err(Error::invalid("the disk is not served here")),
        }
    }

    /// What each device is and uses.
    pub fn all(&self) -> impl Iterator<Item = &InUse> {
        self.devices.iter().map(|(_, device)| device.in_use())
    }
}

impl Server for Devices {
    fn addresses(&self) -> Vec<String> {
        self.devices
            .iter()
            .map(|(_, device)| device.path())
            .collect()
    }

    fn wait(&self) -> Result<()> {
        let devices = || self.devices.iter().map(|(_, device)| device);
        self.ends
            .wait_until(|| devices().all(Device::is_over) || devices().any(Device::has_failed));
        match devices().find_map(Device::failure) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn stop(&self) {
        self.devices.iter().for_each(|(_, device)| device.stop());
    }

    fn hand_over(&self) -> Result<()> {
        let devices = || self.devices.iter().map(|(_, device)| device);
        devices().try_for_each(Device::may_hand_over)?;
        match devices().all(Device::hand_over) {
            true => Ok(()),
            false => Err(Error::invalid("the server ends already")),
        }
    }

    fn resized(&self, export: &Export) -> Result<()> {
        self.of(export)?.resized(export)
    }

    fn may_resize(&self, export: &Export) -> Result<()> {
        self.of(export)?.may_resize()
    }

    fn drains(&self) -> bool {
        true
    }

    fn merged(&self, export: usize, kind: Kind) -> Option<u64> {
        let (_, device) = self.devices.get(export)?;
        merged::requests(device.in_use().id, kind)
    }

    fn in_use(&self, export: usize) -> Vec<(&'static str, String)> {
        let Some((_, device)) = self.devices.get(export) else {
            return Vec::new();
        };
        let used = device.in_use();
        vec![
            ("kind", "ublk".to_owned()),
            ("transfer", used.transfer.to_string()),
            ("queues", used.queues.to_string()),
            ("depth", used.depth.to_string()),
            ("max-io", used.max_io.to_string()),
            ("workers", used.workers.to_string()),
            ("features", used.features.to_string()),
        ]
    }
}

//! New packages: a descriptor, a manifest, and disks that importers stream.

mod adopt;
mod machine;
mod xml;

use std::collections::HashSet;

use crate::container::tar::write::{Flavour, end, header, padding};
use crate::error::{Error, Result};
use crate::formats::ova::write::adopt::Adopted;
use crate::formats::ova::write::machine::{Machine, OPTIONS};
use crate::image::assemble::{Assembler, Assembly, Plan, Stored};
use crate::image::options::OptionValues;
use crate::util::align::len64;
use crate::util::digest::{Algorithm, Hasher};
use crate::util::text::printable;

/// How packages in one file are made.
pub(super) static ASSEMBLER: Assembler = Assembler {
    options: OPTIONS,
    disk_format: "vmdk",
    disk_options,
    plan,
};

/// Of the kind that the controller wants, as importers go by it.
fn disk_options(values: &OptionValues) -> Result<Vec<String>> {
    let controller = machine::controller(values);
    Ok(vec![
        "subformat=streamOptimized".to_owned(),
        format!("adapter_type={}", controller.adapter()),
    ])
}

fn plan(plan: &Plan<'_>) -> Result<Box<dyn Assembly>> {
    let machine = Machine::of(plan)?;
    let text = match plan.description {
        Some(bytes) => {
            machine::refuse_description(plan.values)?;
            Text::Own(Adopted::of(bytes, plan.disks)?)
        }
        None => Text::Made(plan.disks.to_vec()),
    };
    let package = Package { machine, text };
    let (descriptor, manifest) = package.names();
    let disks = (0..package.disks()).map(|number| package.disk_name(number));
    let mut names = HashSet::from([descriptor, manifest]);
    for name in disks {
        if !names.insert(name.clone()) {
            let name = printable(&name);
            let text = format!("two files of the appliance are called '{name}' (allowed: one)");
            return Err(Error::invalid(text));
        }
        // Before anything is written.
        header(&name, 0)?;
    }
    Ok(Box::new(package))
}

/// Where the descriptor comes from.
#[derive(Debug)]
enum Text {
    /// It is made, for disks of these sizes.
    Made(Vec<u64>),
    /// The user has it.
    Own(Adopted),
}

#[derive(Debug)]
struct Package {
    machine: Machine,
    text: Text,
}

impl Package {
    fn disks(&self) -> usize {
        match &self.text {
            Text::Made(disks) => disks.len(),
            Text::Own(adopted) => adopted.names().len(),
        }
    }

    fn disk_name(&self, number: usize) -> String {
        match &self.text {
            Text::Made(_) => self.machine.disk_name(number),
            Text::Own(adopted) => adopted.names().get(number).cloned().unwrap_or_default(),
        }
    }

    fn descriptor(&self, stored: &[u64]) -> String {
        match &self.text {
            Text::Made(disks) => xml::descriptor(&self.machine, disks, stored),
            Text::Own(adopted) => adopted.text(stored),
        }
    }

    /// The descriptor's name, and the manifest's.
    fn names(&self) -> (String, String) {
        let name = &self.machine.name;
        (format!("{name}.ovf"), format!("{name}.mf"))
    }

    fn manifest(&self, algorithm: Algorithm, descriptor: &str, disks: &[Stored]) -> String {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(descriptor.as_bytes());
        let line = |name: &str, digest: &str| format!("{}({name})= {digest}\n", algorithm.name());
        let mut text = line(&self.names().0, &hasher.finish());
        for (number, disk) in disks.iter().enumerate() {
            let digest = disk.digest.as_deref().unwrap_or_default();
            text += &line(&self.disk_name(number), digest);
        }
        text
    }

    /// The members before the disks.
    fn members(&self, disks: &[Stored]) -> Vec<(String, String)> {
        let stored: Vec<u64> = disks.iter().map(|disk| disk.len).collect();
        let descriptor = self.descriptor(&stored);
        let (name, manifest) = self.names();
        let manifest = self.machine.manifest.map(|algorithm| {
            let text = self.manifest(algorithm, &descriptor, disks);
            (manifest, text)
        });
        std::iter::once((name, descriptor))
            .chain(manifest)
            .collect()
    }
}

impl Assembly for Package {
    fn digest(&self) -> Option<Algorithm> {
        self.machine.manifest
    }

    fn head_len(&self) -> u64 {
        let digits = self.machine.manifest.map_or(0, Algorithm::digits);
        let any = Stored {
            len: 0,
            digest: Some("0".repeat(digits)),
        };
        let members = self.members(&vec![any; self.disks()]);
        let len = |text: &String| len64(text.len());
        let lens = members
            .iter()
            .map(|(_, text)| 512 + len(text) + padding(len(text)));
        lens.sum()
    }

    fn head(&self, disks: &[Stored]) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for (name, text) in self.members(disks) {
            bytes.extend(header(&name, len64(text.len()))?);
            bytes.extend(text.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        Ok(bytes)
    }

    fn before_len(&self) -> u64 {
        self.machine.flavour.header_len()
    }

    fn before(&self, number: usize, len: u64) -> Result<Vec<u8>> {
        let flavour: Flavour = self.machine.flavour;
        flavour.header(&self.disk_name(number), len)
    }

    fn after(&self, len: u64) -> u64 {
        padding(len)
    }

    fn end(&self, at: u64) -> u64 {
        end(at)
    }
}

#[cfg(test)]
mod tests;

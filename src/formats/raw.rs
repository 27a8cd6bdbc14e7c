//! raw: the disk's bytes as they are.  A regular file of any length, or a block device.

use crate::error::{Error, ErrorKind, Result};
use crate::image::create::{CreateOptions, PREALLOCATION, Preallocation, preallocate};
use crate::image::driver::Creator;
use crate::image::flat::Flat;
use crate::image::{Caps, Driver, Image, LayerBelow, Resize, Run, Store, Wait};
use crate::storage::{Limits, Storage, has_room};

/// The registry row.
pub static DRIVER: Driver = Driver {
    name: "raw",
    aliases: &[],
    extensions: &["raw", "img", "dd", "bin", "iso"],
    about: "the disk's bytes as they are",
    is_plain: true,
    names_uris: false,
    probe: |_| 1,
    open: |storage, options| {
        let size = storage.size();
        Ok(Box::new(Raw(Flat::new(storage, options, size))))
    },
    open_options: &[],
    creator: Some(Creator {
        create,
        settle: |options| Ok(options.clone()),
        measure,
        measure_bitmaps: |_, _| None,
        cluster_size: |_| Ok(1),
        options: &[PREALLOCATION],
        compress: None,
        sequence: None,
    }),
};

fn refuse_backing(options: &CreateOptions) -> Result<()> {
    match options.backing {
        None => Ok(()),
        Some(_) => Err(Error::unsupported(
            "format 'raw' cannot have a backing file",
        )),
    }
}

fn measure(options: &CreateOptions, _data_clusters: u64) -> Result<u64> {
    refuse_backing(options)?;
    Ok(options.size)
}

fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    refuse_backing(options)?;
    // A block device has a length of its own; it need only be long enough.
    match storage.set_len(options.size) {
        Err(e) if e.kind() == ErrorKind::Unsupported => {
            if options.preallocation() != Preallocation::Off {
                return Err(Error::unsupported(
                    "preallocation is for files: this has the length and the space that it has",
                ));
            }
            has_room(storage, options.size)?;
        }
        done => done?,
    }
    preallocate(storage, 0..options.size, options.preallocation())
}

#[derive(Debug)]
struct Raw(Flat);

impl Image for Raw {
    fn driver(&self) -> &'static Driver {
        &DRIVER
    }

    fn virtual_size(&self) -> u64 {
        self.0.size()
    }

    fn cluster_size(&self) -> Option<u64> {
        None
    }

    fn limits(&self) -> Limits {
        self.0.storage.limits()
    }

    fn caps(&self) -> Caps {
        self.0.caps()
    }

    fn storage(&self) -> &dyn Storage {
        &*self.0.storage
    }

    fn map(&self, at: u64, len: u64, _wait: Wait) -> Result<Run<'_>> {
        Ok(self.0.map(at, len))
    }

    fn store(&self) -> Option<&dyn Store> {
        Some(&self.0)
    }

    fn close(&self) -> Result<()> {
        self.0.close()
    }

    fn as_resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }
}

impl Resize for Raw {
    fn resize(&self, virtual_size: u64, _below: LayerBelow) -> Result<()> {
        self.0.may_write()?;
        self.0.storage.set_len(virtual_size)?;
        self.0.set_size(virtual_size);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::image::open::OpenOptions;
    use crate::storage::memory::MemoryStorage;
    use crate::storage::open::Access;
    use crate::storage::{Zeroing, zero_or_write};

    #[test]
    fn a_raw_image_grows_and_shrinks() {
        let storage = Arc::new(MemoryStorage::from_bytes(&[1; 1000]));
        let options = OpenOptions {
            access: Access::Write,
            ..OpenOptions::default()
        };
        let image = (DRIVER.open)(storage.clone(), &options).expect("raw opens anything");
        assert_eq!(image.virtual_size(), 1000);
        image
            .as_resize()
            .expect("raw resizes")
            .resize(2000, LayerBelow::Nothing)
            .expect("grows");
        assert_eq!(storage.to_bytes().len(), 2000);
        zero_or_write(&*storage, 0..10, Zeroing::KeepSpace).expect("zeroes");
        assert_eq!(storage.to_bytes()[..11], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    }
}

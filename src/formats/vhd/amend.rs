//! What XenServer's storage manager records of a disk: whether it is hidden, and its marker.

use crate::error::{Error, Result};
use crate::formats::vhd::batmap::{self, MARKER};
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::amend::Amend;
use crate::image::options::{OptionKind, OptionSpec, OptionValues};

/// The options that can be changed.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "hidden",
        kind: OptionKind::Number,
        default: "",
        help: "XenServer: 0 visible, 1 hidden from the user, 2 also not to be coalesced",
    },
    OptionSpec {
        name: "marker",
        kind: OptionKind::Number,
        default: "",
        help: "XenServer: 0 to 255, of disks that have a batmap",
    },
];

/// The value of an option that is a byte of at most `most`.
fn byte(values: &OptionValues, name: &str, most: u8) -> Result<Option<u8>> {
    let Some(value) = values.number(name) else {
        return Ok(None);
    };
    match u8::try_from(value).ok().filter(|byte| *byte <= most) {
        Some(byte) => Ok(Some(byte)),
        None => Err(Error::invalid(format!(
            "option '{name}' is {value} (allowed: 0 to {most})"
        ))),
    }
}

impl Amend for Sparse {
    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn amend(&mut self, values: &OptionValues) -> Result<()> {
        let hidden = byte(values, "hidden", 2)?;
        let marker = byte(values, "marker", u8::MAX)?;
        self.whole_footer("options")?;
        let shape = self.shape.load_full();
        let place = shape.batmap().and_then(|map| map.ranges().first());
        if let Some(marker) = marker {
            let Some(batmap) = place else {
                return Err(Error::unsupported(
                    "a marker is kept beside a batmap, which this disk does not have",
                ));
            };
            self.write_in_order(&[marker], batmap.start + MARKER)?;
        }
        if let Some(hidden) = hidden {
            let footer = shape.footer.hidden_as(hidden);
            self.replace_footers(&self.space.lock(), &shape, footer)?;
        } else {
            // What `info` shows of the batmap is read again.
            let batmap = batmap::read(&*self.storage, &shape.footer, &shape.header)?;
            let shape = Shape::new(shape.footer, shape.header, self.rule, batmap);
            self.shape.store(shape.into());
        }
        self.storage.sync()
    }
}

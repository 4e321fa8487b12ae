//! Rows that hold eight bits a number fit such rows only, and are made on a GPU only.

use std::sync::Arc;

use kvtide_kernels::copy::{CopyError, Device, Direction, HostDevice, Registration};
use kvtide_kernels::{Codec, Float, KvLayout, TensorView};
use kvtide_segment::{Holder, HugePages, RowGeometry, SegmentOptions, SharedSegment};

const BLOCKS: u32 = 4;
const LAYER_BYTES: usize = 1024;

/// A layout of one layer with one scale, its memory, and a segment for rows of `row_layer_bytes`.
fn registration(row_layer_bytes: usize) -> Option<Registration> {
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let options = SegmentOptions {
        directory: directory.path().to_owned(),
        instance: "encoded".to_owned(),
        huge_pages: HugePages::Off,
        holder: Holder::Worker(0),
        available_bytes: u64::MAX,
    };
    let geometry = RowGeometry::fit(1, 1, row_layer_bytes, 1 << 20).expect("a geometry");
    let segment =
        SharedSegment::create_or_attach(&options, geometry, &|_, _| {}).expect("a segment");
    let memory: Box<[u128]> = vec![0; BLOCKS as usize * LAYER_BYTES / size_of::<u128>()].into();
    let views = [TensorView {
        name: "layer".into(),
        address: memory.as_ptr().expose_provenance(),
        reachable_bytes: BLOCKS as usize * LAYER_BYTES,
        shape: vec![BLOCKS as usize, LAYER_BYTES / 2],
        strides_bytes: vec![LAYER_BYTES, 2],
        item_bytes: 2,
    }];
    let layout = KvLayout::new(&views, BLOCKS, LAYER_BYTES).expect("a layout");
    let layout = layout
        .encoded(Float::Bfloat16, &views, &[vec![]])
        .expect("an encoding");
    // SAFETY: the memory is owned by the registration, and nothing is copied.
    unsafe { Registration::new(layout, Arc::new(segment), 0, Arc::new(memory)) }.ok()
}

#[test]
fn a_segment_for_whole_numbers_is_not_taken_for_encoded_ones() {
    assert!(registration(LAYER_BYTES).is_none());
    assert!(registration(Codec::Fp8.row_layer_bytes(LAYER_BYTES, 1)).is_some());
}

#[test]
fn host_memory_refuses_rows_that_it_cannot_encode() {
    let registration = registration(Codec::Fp8.row_layer_bytes(LAYER_BYTES, 1)).expect("it fits");
    let device = HostDevice::new(Arc::new(registration));
    let refused = device.backend(Direction::Save).err();
    assert!(
        matches!(refused, Some(CopyError::CannotEncode { .. })),
        "{refused:?}"
    );
}

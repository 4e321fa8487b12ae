//! The pool of one model in a node's memory, for one tenant.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvtide_model::NamespaceId;
use kvtide_model::wire::Geometry;
use kvtide_segment::{MappedFile, RowGeometry, SegmentParts, SharedSegment, reserve};

use super::error::{NodeError, io_error};
use super::growth::Denials;
use super::memory::{Memory, rows_of};
use super::options::NodeOptions;
use crate::pool::{Pool, PoolOptions};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct ModelPool {
    pub(super) pool: Arc<Pool>,
    pub(super) rows: RowGeometry,
    pub(super) tables: File,
    tables_path: PathBuf,
    parts: SegmentParts,
    extent_bytes: usize,
    pub(super) denials: Denials,
}

/// The rows that blocks of this shape have in a memory of so many extents.
pub(super) fn rows(
    geometry: &Geometry,
    extents: u32,
    extent_bytes: usize,
) -> Result<RowGeometry, kvtide_segment::GeometryError> {
    let Geometry { ranks, layers, .. } = *geometry;
    let layer_bytes = usize::try_from(geometry.layer_bytes).unwrap_or(usize::MAX);
    // A row that does not fit in an extent fits nowhere.
    RowGeometry::over(ranks, layers, layer_bytes, extent_bytes)?;
    RowGeometry::over(ranks, layers, layer_bytes, extents as usize * extent_bytes)
}

impl ModelPool {
    /// A pool without rows.
    pub(super) fn open(
        memory: &Memory,
        options: &NodeOptions,
        namespace: NamespaceId,
        rows: RowGeometry,
    ) -> Result<Self, NodeError> {
        let (tables, tables_path) = memory.tables(namespace, &rows)?;
        let [fixed, ..] = rows.tables_file_ranges(&(0..0));
        reserve(&tables, &tables_path, fixed)?;
        let parts = SegmentParts {
            memory: memory.mapped.clone(),
            data_offset: 0,
            tables: MappedFile::of(&tables, &tables_path)?,
            // The daemon runs no loads.
            own: MappedFile::private(rows.own_bytes())?,
        };
        let segment = SharedSegment::of_parts(&parts, rows, memory.path())?;
        let pool = PoolOptions {
            eviction: options.eviction,
        };
        Ok(Self {
            pool: Arc::new(Pool::without_rows(Arc::new(segment), pool)),
            rows,
            tables,
            tables_path,
            parts,
            extent_bytes: options.extent_bytes,
            denials: Denials::default(),
        })
    }

    /// Writes the header of what an engine of this model has for itself, which it has not got yet.
    pub(super) fn write_own_header(&self, own: &Path) -> Result<(), NodeError> {
        let file = File::options().read(true).write(true).open(own);
        let file = file.map_err(io_error("open", own))?;
        let parts = SegmentParts {
            own: MappedFile::of(&file, own)?,
            ..self.parts.clone()
        };
        SharedSegment::of_parts(&parts, self.rows, own)?.write_header();
        Ok(())
    }

    /// The rows that lie in an extent.
    pub(super) fn rows_of(&self, extent: u32) -> std::ops::Range<u32> {
        rows_of(&self.rows, extent, self.extent_bytes)
    }

    /// Takes memory for what the tables say of an extent's rows.
    pub(super) fn reserve_tables(&self, extent: u32) -> Result<(), NodeError> {
        let ranges = self.rows.tables_file_ranges(&self.rows_of(extent));
        for range in ranges {
            reserve(&self.tables, &self.tables_path, range)?;
        }
        Ok(())
    }
}
